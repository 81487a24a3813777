"The reference, with which the race begins: every option as in REFERENCE."
from minikl.ingredients import Entry

ENTRY = Entry("today's Llama")

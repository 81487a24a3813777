"The learning rate falls along a line. Defazio et al. 2023, arXiv:2310.07831."
from minikl.ingredients import Entry

ENTRY = Entry("+ linear decay", {"decay": "linear"})

"""The first embeddings and output layer know how often a token follows another. With
this train.py has its defaults."""
from minikl.ingredients import Entry

OPTIONS = {"decay": "linear", "candidates": 500, "first_weights": "bigrams"}
ENTRY = Entry("+ start from bigrams", OPTIONS)

"""The output layer chooses among the tokens of the step and 500 others, so that a step
costs less. Jean et al. 2015, arXiv:1412.2007."""
from minikl.ingredients import Entry

ENTRY = Entry("+ sampled softmax", {"decay": "linear", "candidates": 500})

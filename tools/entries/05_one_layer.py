"""One block in place of two: a step is cheaper, and a short race is won by steps."""
from minikl.ingredients import Entry

OPTIONS = {
    "decay": "linear",
    "candidates": 500,
    "first_weights": "bigrams",
    "num_layers": 1,
}
ENTRY = Entry("+ one layer in place of two", OPTIONS)

"""An example to copy, no record: evaluate the average of the last weights of a run.

Izmailov et al. 2018, arXiv:1803.05407.
"""
from torch.optim.swa_utils import AveragedModel

from minikl.ingredients import Entry
from minikl.learner import Learner


class Averaged(Learner):
    "In the last fifth of the run, the weights after each step enter an average."

    average = None

    def step(self, documents, step, done):
        result = super().step(documents, step, done)
        if done > 0.8:
            self.average = self.average or AveragedModel(self.model)
            self.average.update_parameters(self.model)
        return result

    def bits_per_char(self, documents):
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())
        return super().bits_per_char(documents)


OPTIONS = {"decay": "linear", "candidates": 500, "first_weights": "bigrams"}
ENTRY = Entry("+ average of the last weights", OPTIONS, Averaged)

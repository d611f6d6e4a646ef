"""How far a changed model's outputs are from those it gave before: what budgets over layers are about."""

from torch import Tensor, nn

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.calibration import Samples, run_samples


class OutputError:
    """The outputs of a model on samples, to compare with.

    The error counts as ||o' - o||^2 / ||o - mean o||^2 with the mean over samples, averaged over what the model gives
    out.

    Args:
        model: as it is now.
        samples: what it is run on; on this process alone.
    """

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self.samples = samples
        self._expected = self._outputs(model)
        self._variances = [sum(map(_variation, tensors)) for tensors in self._expected]

    def of(self, model: nn.Module) -> float:
        """The error of another model's outputs, or of the same one as it is now."""
        errors = [
            sum(float((given - wanted).square().sum()) for given, wanted in zip(givens, tensors, strict=True))
            / variance
            for givens, tensors, variance in zip(self._outputs(model), self._expected, self._variances, strict=True)
            if variance > 0
        ]
        return sum(errors) / max(len(errors), 1)

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        """Of each floating-point tensor that the model gives out, its values in all batches."""
        batches = [
            [tensor.float() for tensor in tensors_in(output) if tensor.is_floating_point()]
            for output in run_samples(model, self.samples)
        ]
        return [list(tensors) for tensors in zip(*batches, strict=True)]


def _variation(tensor: Tensor) -> float:
    """||o - mean o||^2 as if the mean over samples were known exactly; over everything where there is one sample."""
    if tensor.dim() == 0 or len(tensor) < 2:
        return float((tensor - tensor.mean()).square().sum())
    return float(tensor.var(0).sum()) * len(tensor)

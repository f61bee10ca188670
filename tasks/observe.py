"""Observe what the calibration rows do to the inputs of every layer, once for all formats that go by it.

python -m flows optimize RECIPE     (stage `observe`)

The largest value (algorithm max) and the histogram (percentile, entropy) of an input say nothing of a
format. SmoothQuant, AWQ and FP8 attention look at more than a layer's input and run the rows themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tasks import batches, checkpoints, layers, store
from tasks.artifacts import Checkpoint, Dataset, Observations
from tasks.stage import stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Loop = Callable[[nn.Module], None]

Kind = Literal["ranges", "histograms"]
FILE = "observations.safetensors"


@stage(uses=("torch", "nvidia-modelopt", "transformers"), name="observe", gpu=True, timeout_seconds=3 * 3600)
def observe(checkpoint: Checkpoint, dataset: Dataset, batch_size: int, kind: Kind) -> Observations:
    """Run every calibration row through the network as it is."""
    from safetensors.torch import save_file

    model, config = checkpoints.restore(checkpoint)
    model, _ = checkpoints.without_norms(model, config, batches.forward(dataset, checkpoint))
    model.to(checkpoints.device())
    loop = batches.forward_loop(dataset, batches.preprocessor(checkpoint), batch_size, "observe")
    found = observed(model, kind, loop)
    with store.staging() as folder:
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, folder / FILE)
        return Observations(store.commit(folder), kind, dataset.rows["calibration"])


def read(observations: Observations) -> dict[str, Tensor]:
    """What `observed` returned."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(store.path(observations.blob) / FILE)
    return found


def observed(model: nn.Module, kind: Kind, loop: Loop) -> dict[str, Tensor]:
    """Ranges: the largest absolute input of each layer that ran, shape (). Histograms: `LAYER.counts` of
    shape (bins,) over absolute inputs and `LAYER.edges` of shape (bins + 1,), as ModelOpt collects them."""
    import torch
    from torch import nn

    with checkpoints.quiet():
        from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator

    collect = {"ranges": MaxCalibrator, "histograms": HistogramCalibrator}[kind]
    inputs = {n: m for n, m in layers.quantizable(model).items() if not isinstance(m, nn.Embedding)}
    collectors: dict[str, Any] = {name: collect(8, None, False) for name in inputs}
    hooks = [module.register_forward_pre_hook(_to(collectors[name])) for name, module in inputs.items()]
    try:
        with torch.no_grad():
            loop(model)
    finally:
        for hook in hooks:
            hook.remove()
    if kind == "ranges":
        largest = {name: found.compute_amax() for name, found in collectors.items()}
        return {name: value for name, value in largest.items() if value is not None}
    ran = {name: found for name, found in collectors.items() if found._calib_hist is not None}
    counts = {f"{name}.counts": found._calib_hist for name, found in ran.items()}
    return counts | {f"{name}.edges": found._calib_bin_edges for name, found in ran.items()}


def _to(collector: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        collector.collect(inputs[0].detach())

    return hook

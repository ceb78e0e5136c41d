"""The networks that this project ships, by name: what each is run with. Entry points of pyproject.toml lead here.

Their definitions are imported only where PyTorch runs them; a node on a CPU has none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base import Execution
from pipelines.golden import Deviation, deviation
from pipelines.network import NetworkPipeline
from pipelines.runtime import WEIGHTS, ExecutionRefused

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes a pipeline; ``definition`` is ``MODULE.CLASS`` in this package, or a class method of it."""

    name: str
    definition: str
    arguments: tuple[int, ...] = ()
    stride: int = 1
    noise_map_stride: int = 1

    def __call__(self, execution: Execution | None = None, folder: Path = WEIGHTS) -> NetworkPipeline:
        """The pipeline; raises what `NetworkPipeline` raises.

        In INT8 it is compared with itself in fp32 first, on the golden volume and on this very CPU. If it is farther
        off than its card allows, it runs in fp32 instead, and the card's `reason` says why; where INT8 was demanded,
        `pipelines.runtime.ExecutionRefused` says so.
        """
        execution = execution or Execution()
        made = self._made(execution, folder)
        bound = made.card.int8_bound_hu
        if made.card.precision != "int8" or bound is None:
            return made
        exact = self._made(replace(execution, device="cpu", precision="fp32"), folder)
        found = deviation(made, exact)
        if found.within(Deviation(*bound)):
            return made
        why = (
            f"in INT8 {self.name} is up to {found.max_hu:.1f} HU (rms {found.rms_hu:.2f}) from fp32 on this CPU, its "
            f"card allows {bound[0]:.1f} (rms {bound[1]:.2f})"
        )
        if execution.precision == "int8":
            raise ExecutionRefused(f"{why}: set precision auto or fp32, and tell us the CPU")
        log.warning("%s; it runs in fp32", why)
        exact.card = replace(exact.card, reason=f"the CPU, fp32: {why}")
        return exact

    def _made(self, execution: Execution, folder: Path) -> NetworkPipeline:
        return NetworkPipeline(
            self.name,
            self.network,
            stride=self.stride,
            noise_map_stride=self.noise_map_stride,
            execution=execution,
            folder=folder,
        )

    def network(self) -> nn.Module:
        """The network, untrained."""
        module, _, maker = self.definition.partition(".")
        made: nn.Module = attrgetter(maker)(import_module(f"pipelines.{module}"))(*self.arguments)
        return made


quality_2p5d = Factory("quality-2.5d", "resunet.ResUNet", stride=4)
fast_2p5d = Factory("fast-2.5d", "ffdnet.FFDNet", stride=2, noise_map_stride=2)
st3d = Factory("st3d", "stresnet.STResNet")
srresnet3d = Factory("srresnet3d", "stresnet.SRResNet3D")
st3d_wide = Factory("st3d-wide", "stresnet.STResNet", (64,))
srresnet3d_wide = Factory("srresnet3d-wide", "stresnet.SRResNet3D", (64,))
hqinet = Factory("hqinet", "hqinet.HQINet", stride=16)
hqinet_lite = Factory("hqinet-lite", "hqinet.HQINet.lite", stride=16)
dcscn = Factory("dcscn", "dcscn.DCSCN")
dcswgan = Factory("dcswgan", "dcscn.DCSCN")
cnn_l1 = Factory("cnn-l1", "dcscn.PlainCNN")
wgan = Factory("wgan", "dcscn.PlainCNN")
drl = Factory("drl", "cascade.DRL")
drl_mse = Factory("drl-mse", "cascade.DRL")
cnn10 = Factory("cnn10", "cascade.WuCNN10")
cascade = Factory("cascade", "cascade.Cascade")
cascade_mse = Factory("cascade-mse", "cascade.Cascade")
cascade_3 = Factory("cascade-3", "cascade.Cascade", (3,))
red_cnn = Factory("red-cnn", "redcnn.REDCNN")

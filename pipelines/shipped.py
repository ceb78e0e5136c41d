"""The networks that this project ships, by name: what each is run with. Entry points of pyproject.toml lead here.

Their definitions are imported only where PyTorch runs them; a node on a CPU has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base import Execution
from pipelines.network import NetworkPipeline
from pipelines.runtime import WEIGHTS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes a pipeline; ``definition`` is ``MODULE.CLASS`` in this package, or a class method of it."""

    name: str
    definition: str
    arguments: tuple[int, ...] = ()
    stride: int = 1
    noise_map_stride: int = 1

    def __call__(self, execution: Execution | None = None, folder: Path = WEIGHTS) -> NetworkPipeline:
        """The pipeline; raises what `NetworkPipeline` raises."""
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

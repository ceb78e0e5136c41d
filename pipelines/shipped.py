"""The networks that this project ships, by name: what each is run with. Entry points of pyproject.toml lead here.

Their definitions are imported only where PyTorch runs them; a node on a CPU has none.
"""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipelines.base import Execution
from pipelines.network import NetworkPipeline
from pipelines.runtime import WEIGHTS

if TYPE_CHECKING:
    from torch import nn


class Factory(Protocol):
    """Makes a pipeline; raises what `NetworkPipeline` raises."""

    def __call__(self, execution: Execution | None = None, folder: Path = WEIGHTS) -> NetworkPipeline: ...


def _ships(name: str, network: str, *arguments: int, stride: int = 1, noise_map_stride: int = 1) -> Factory:
    """`network` is ``MODULE.CLASS`` in this package, or a class method that makes one."""
    module, _, maker = network.partition(".")

    def make() -> nn.Module:
        made: nn.Module = attrgetter(maker)(import_module(f"pipelines.{module}"))(*arguments)
        return made

    def factory(execution: Execution | None = None, folder: Path = WEIGHTS) -> NetworkPipeline:
        return NetworkPipeline(
            name, make, stride=stride, noise_map_stride=noise_map_stride, execution=execution, folder=folder
        )

    return factory


quality_2p5d = _ships("quality-2.5d", "resunet.ResUNet", stride=4)
fast_2p5d = _ships("fast-2.5d", "ffdnet.FFDNet", stride=2, noise_map_stride=2)
st3d = _ships("st3d", "stresnet.STResNet")
srresnet3d = _ships("srresnet3d", "stresnet.SRResNet3D")
hqinet = _ships("hqinet", "hqinet.HQINet", stride=16)
hqinet_lite = _ships("hqinet-lite", "hqinet.HQINet.lite", stride=16)
dcscn = _ships("dcscn", "dcscn.DCSCN")
dcswgan = _ships("dcswgan", "dcscn.DCSCN")
cnn_l1 = _ships("cnn-l1", "dcscn.PlainCNN")
wgan = _ships("wgan", "dcscn.PlainCNN")
drl = _ships("drl", "cascade.DRL")
cnn10 = _ships("cnn10", "cascade.WuCNN10")
cascade = _ships("cascade", "cascade.Cascade")
cascade_mse = _ships("cascade-mse", "cascade.Cascade")
cascade_3 = _ships("cascade-3", "cascade.Cascade", 3)
red_cnn = _ships("red-cnn", "redcnn.REDCNN")

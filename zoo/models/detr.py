"""DETR on any trunk: an encoder on one map, and learned queries that attend to it (Carion et al. 2020,
arXiv:2005.12872)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import Carry, Context, Memory
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.detection import MLP, DetectorConfig, Noised, Predicted, Trained, padded, wide, xavier
from zoo.models.trunk import Trunk
from zoo.norms import NORMS
from zoo.spec import Choice, make, parse
from zoo.stems.images import checked
from zoo.tensors import to_map
from zoo.text import unknown

PADDINGS = ("hidden", "published")


@dataclass(frozen=True, kw_only=True)
class DETRConfig(DetectorConfig):
    """A detector with learned queries.

    Args:
        trunk: image model whose last map the encoder reads.
        padding: hidden for a trunk that does not see padding, so that it changes nothing; published for one that sees
            zeros there, as the published weights were trained: boxes then depend on what shares the batch.
    """

    losses = ("softmax",)

    image: int = 800
    queries: int = 100
    encoder_depth: int = 6
    padding: str = "hidden"
    ffn: Choice = "mlp(ratio=8.0, activation='relu')"
    decoder_ffn: str = "mlp(ratio=8.0, activation='relu')"
    position: Choice = "sine"

    def check_sizes(self) -> None:
        super().check_sizes()
        if self.padding not in PADDINGS:
            raise ValueError(f"padding: {unknown('name', self.padding, PADDINGS)}")
        if parse(self.cross)[0] == "deformable":
            raise ValueError("cross: deformable samples around boxes, which the queries of a detr do not have")

    def probe_outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return model(**inputs)

    def build(self) -> "DETR":
        return DETR(self)


class DETR(Model[DETRConfig]):
    """model(images [B, channels, H, W], mask [B, H, W] | None) -> {"logits": [B, Q, classes + 1], "boxes": [B, Q, 4]}.

    The last logit means no object. H and W are free. Boxes are (centre x, centre y, width, height) in 0..1 of each
    image's own extent: padding and the other images of a batch change nothing at inference, unless padding is
    `published`.
    """

    replaceable = ("score",)

    def __init__(self, config: DETRConfig) -> None:
        super().__init__(config)
        dim, place = config.dim, config.block(1).place
        self.trunk = Trunk(config.trunk, config.channels, config.image, (), config.trunk_norm == "frozen")
        self.input = xavier(self.trunk.channels[0], dim)
        self.position = make_position(config)
        rates = drop_rates(config.drop_path, config.encoder_depth)
        self.encoder = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(rates))
        self.query = nn.Embedding(config.queries, dim)
        self.decoder = nn.ModuleList(make_block(config, 1, index, 0.0) for index in range(config.depth))
        self.norm = make(NORMS, config.decoder_norm, dim, place)
        self.score, self.box = nn.Linear(dim, config.classes + 1), MLP(dim, dim, 4, 3)

    @property
    def strides(self) -> list[int]:
        return [*self.trunk.strides]

    @property
    def channels(self) -> list[int]:
        return [self.config.dim]

    def features(self, images: Tensor, layers: Sequence[int] | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The map behind the encoder [B, dim, H', W']; `layers` may only name that one."""
        wanted = chosen_layers(layers, 1, "map")
        memory = self.encode(images, mask)
        return [to_map(memory.tokens, memory.grids[0]) for _ in wanted]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """images [B, channels, H, W] and a mask [B, H, W] of real pixels -> logits [B, Q, classes + 1] and boxes
        [B, Q, 4]."""
        found = self.predict(images, mask).layers
        return {"logits": found.logits[-1], "boxes": found.boxes[-1]}

    def predict(self, images: Tensor, mask: Tensor | None = None, noised: Noised | None = None) -> Trained:
        """What the losses need: the predictions of every decoder layer; in eval mode, only those of the last. There
        are no proposals and no denoising queries."""
        assert noised is None
        return Trained(self.decode(self.encode(images, mask)), None, None)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Memory:
        """The memory of the decoder."""
        if self.config.padding == "published":
            ((x, context),) = self.trunk(checked(images, mask, self.config.channels), None)
            if mask is not None:
                real = F.interpolate(mask[:, None].float(), size=context.grid)
                context = context._replace(mask=real.flatten(1) > 0)
        else:
            ((x, context),) = self.trunk(*padded(images, mask, self.config.channels, self.trunk.strides[-1]))
        inside = self.position.place(context)
        x = self.run(self.encoder, self.position(self.input(x), inside), inside)
        return Memory(x, context.mask, inside.code, (context.grid,))

    def decode(self, memory: Memory) -> Predicted:
        """The predictions after each decoder block, [layers, B, Q, ...]; in eval mode only the last ones."""
        number = self.config.queries
        code = self.query(torch.arange(number, device=memory.tokens.device))[None].to(memory.tokens.dtype)
        context = Context(grid=(number,), code=code, memory=memory, carry=Carry())
        x = torch.zeros_like(code).expand(memory.tokens.shape[0], -1, -1)
        found = []
        for index, block in enumerate(self.decoder):
            x = self.run((block,), x, context)
            if self.training or index + 1 == len(self.decoder):
                found.append(self.norm(x, context))
        x = torch.stack(found)
        return Predicted(self.score(x), wide(self.box(x)).sigmoid())

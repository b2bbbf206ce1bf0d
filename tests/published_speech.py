"""Speech models of transformers and NeMo with random weights, to compare with ours."""

import io
import math
import tarfile

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import (
    ParakeetCTCConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetForCTC,
)

from helpers import randomise, relative

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SMALL |= {"subsampling_conv_channels": 8, "num_mel_bins": 16}
LENGTHS = torch.tensor([67, 50, 93])
TEXTS = ["the cat sat on the mat", "a model of speech reads sound", "nothing is lost in translation"] * 4


def clips(mels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A padded batch, zero behind each clip's length as the features are."""
    features = torch.randn(len(LENGTHS), int(LENGTHS.max()), mels, dtype=dtype)
    return features.masked_fill(~real_frames(LENGTHS)[..., None], 0.0)


def real_frames(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]


@torch.no_grad()
def differ(model, features: torch.Tensor, wanted: torch.Tensor, lengths: torch.Tensor) -> float:
    """How far the model's real frames are from the wanted ones; their numbers have to be equal."""
    got, found = model(features, LENGTHS)
    assert found.tolist() == lengths.tolist() and not model.training
    real = real_frames(lengths)
    return relative(got[real], wanted[real])


def parakeet(blank: int | None = None, outputs: int = 12, encoder: bool = False, **choices) -> nn.Module:
    """Parakeet of transformers whose every parameter and running statistic is random."""
    config = ParakeetEncoderConfig(**(SMALL | choices))
    if encoder:
        return randomise(ParakeetEncoder(config)).eval()
    blank = outputs - 1 if blank is None else blank
    config = ParakeetCTCConfig(vocab_size=outputs, pad_token_id=blank, encoder_config=config)
    return randomise(ParakeetForCTC(config)).eval()


def waves(number: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of the offsets number - 1, ..., 1 - number, exact to the last digit of fp32."""
    offsets = torch.arange(number - 1, -number, -1, dtype=torch.float64)
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    table = torch.zeros(len(offsets), dim, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = torch.sin(offsets[:, None] * rates), torch.cos(offsets[:, None] * rates)
    return table.float().to(dtype)


def refused(path, words: str, convert, *more) -> None:
    """The conversion fails with one line that has the words."""
    with pytest.raises(ValueError, match=words) as caught:
        convert(path, *more)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 450


# NeMo's encoders, implemented from their formulas on tensors with NeMo's names.


class Nemo:
    """A network of NeMo: its config, random tensors with its names, and what it makes of features."""

    def __init__(self, squeeze: bool = False, outputs: int = 12, **choices) -> None:
        defaults = {"subsampling": "dw_striding" if squeeze else "striding", "subsampling_factor": 4}
        defaults |= {"feat_in": 16, "n_layers": 4 if squeeze else 2, "d_model": 24, "n_heads": 2}
        defaults |= {"subsampling_conv_channels": -1, "ff_expansion_factor": 4, "conv_kernel_size": 7}
        defaults |= {"conv_norm_type": "batch_norm", "xscaling": True, "self_attention_model": "rel_pos"}
        defaults |= {"time_reduce_idx": 1, "time_recovery_idx": None, "adaptive_scale": True} if squeeze else {}
        self.cfg = defaults | {"dropout": 0.1, "pos_emb_max_len": 5000, "att_context_size": [-1, -1]} | choices
        kind = "SqueezeformerEncoder" if squeeze else "ConformerEncoder"
        self.squeeze, self.outputs = squeeze, outputs
        self.config = {
            "sample_rate": 16000,
            "encoder": {"_target_": f"nemo.collections.asr.modules.{kind}"} | self.cfg,
            "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": self.cfg["d_model"]}
            | {"num_classes": outputs - 1, "vocabulary": [f"piece{id}" for id in range(outputs - 1)]},
        }
        self.bias = self.cfg.get("use_bias", True)
        self.causal = self.cfg.get("causal_downsampling", False)
        self.tensors = {name: self.random(name, shape) for name, shape in self.shapes().items()}

    @staticmethod
    def random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("running_var"):
            return 0.5 + torch.rand(shape)
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        gain = len(shape) == 1 and name.endswith(("weight", "scale"))
        spread = 0.3 if len(shape) == 1 or "pos_bias" in name else math.prod(shape[1:]) ** -0.5
        return gain + spread * torch.randn(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        cfg, found = self.cfg, {}
        dim, kernel, heads = cfg["d_model"], cfg["conv_kernel_size"], cfg["n_heads"]
        hidden = dim * cfg["ff_expansion_factor"]
        width = dim if cfg["subsampling_conv_channels"] == -1 else cfg["subsampling_conv_channels"]

        def put(name: str, *shape: int, bias: bool = True) -> None:
            found[f"{name}.weight"] = shape
            if bias:
                found[f"{name}.bias"] = shape[:1]

        rows, stages = cfg["feat_in"], int(math.log2(cfg["subsampling_factor"]))
        put("encoder.pre_encode.conv.0", width, 1, 3, 3)
        for stage in range(1, stages):
            if cfg["subsampling"] == "striding":
                put(f"encoder.pre_encode.conv.{2 * stage}", width, width, 3, 3)
            else:
                put(f"encoder.pre_encode.conv.{3 * stage - 1}", width, 1, 3, 3)
                put(f"encoder.pre_encode.conv.{3 * stage}", width, width, 1, 1)
        for _ in range(stages):
            rows = (rows + (3 if self.causal else 2) - 3) // 2 + 1
        put("encoder.pre_encode.out", dim, width * rows)
        inner = 2 * dim if self.squeeze else dim
        for block in range(cfg["n_layers"]):
            start = f"encoder.layers.{block}."
            for branch in ("feed_forward1", "self_att", "conv", "feed_forward2"):
                put(f"{start}norm_{branch}", dim)
                if self.squeeze:
                    scale = start + branch.replace("self_att", "self_attn") + "_scale"
                    found[f"{scale}.scale"] = found[f"{scale}.bias"] = (dim,)
            if not self.squeeze:
                put(f"{start}norm_out", dim)
            for number in (1, 2):
                put(f"{start}feed_forward{number}.linear1", hidden, dim, bias=self.bias)
                put(f"{start}feed_forward{number}.linear2", dim, hidden, bias=self.bias)
            for letter in ("q", "k", "v", "out"):
                put(f"{start}self_attn.linear_{letter}", dim, dim, bias=self.bias)
            put(f"{start}self_attn.linear_pos", dim, dim, bias=False)
            for letter in "uv":
                found[f"{start}self_attn.pos_bias_{letter}"] = (heads, dim // heads)
            put(f"{start}conv.pointwise_conv1", 2 * dim, dim, 1, bias=self.bias)
            put(f"{start}conv.depthwise_conv", inner, 1, kernel, bias=self.bias)
            put(f"{start}conv.pointwise_conv2", dim, inner, 1, bias=self.bias)
            put(f"{start}conv.batch_norm", inner)
            if cfg["conv_norm_type"] == "batch_norm":
                norm = f"{start}conv.batch_norm."
                found |= {f"{norm}running_mean": (inner,), f"{norm}running_var": (inner,)}
                found[f"{norm}num_batches_tracked"] = ()
        if self.squeeze:
            put("encoder.pre_ln", dim)
            if cfg["time_reduce_idx"] is not None:
                put("encoder.time_reduce_layer.dw_conv", dim, 1, 5)
                put("encoder.time_reduce_layer.pw_conv", dim, dim, 1)
                put("encoder.time_recovery_layer", dim, dim)
        put("decoder.decoder_layers.0", self.outputs, dim, 1)
        return found | {"preprocessor.featurizer.window": (400,), "preprocessor.featurizer.fb": (1, 16, 257)}

    def get(self, name: str) -> torch.Tensor | None:
        value = self.tensors.get(name)
        return None if value is None else value.to(self.dtype)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.get(f"{name}.weight")
        return F.linear(x, weight.reshape(weight.shape[:2]), self.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def subsample(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, sides = x[:, None], ((2, 1) if self.causal else (1, 1))
        deep = self.cfg["subsampling"] == "dw_striding"
        for stage in range(int(math.log2(self.cfg["subsampling_factor"]))):
            x = x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None, :, None]
            name = "encoder.pre_encode.conv." + str((3 * stage - 1 if stage else 0) if deep else 2 * stage)
            weight = self.get(f"{name}.weight")
            groups = x.shape[1] if deep and stage else 1
            x = F.conv2d(F.pad(x, (*sides, *sides)), weight, self.get(f"{name}.bias"), stride=2, groups=groups)
            if deep and stage:
                name = f"encoder.pre_encode.conv.{3 * stage}"
                x = F.conv2d(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))
            x = x.clamp(min=0)
            lengths = (lengths + sum(sides) - 3) // 2 + 1
        x = x.permute(0, 2, 1, 3)
        return self.linear(x.reshape(*x.shape[:2], -1), "encoder.pre_encode.out"), lengths

    def attend(self, x: torch.Tensor, name: str, allowed: torch.Tensor) -> torch.Tensor:
        """allowed [B, T, T]; the score of a pair is read from the row of its offset."""
        heads, time = self.cfg["n_heads"], x.shape[1]

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(*y.shape[:-1], heads, -1).transpose(-3, -2)

        query, key, value = (split(self.linear(x, f"{name}.linear_{letter}")) for letter in "qkv")
        rows = split(self.linear(waves(time, x.shape[2], x.dtype), f"{name}.linear_pos"))
        u, v = (self.get(f"{name}.pos_bias_{letter}")[:, None] for letter in "uv")
        places = torch.arange(time)
        row = (time - 1) - (places[:, None] - places)
        by_row = (query + v) @ rows.transpose(-2, -1)
        far = by_row.gather(-1, row.expand(len(x), heads, -1, -1))
        scores = ((query + u) @ key.transpose(-2, -1) + far) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~allowed[:, None], -1e9).softmax(-1)
        return self.linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.linear_out")

    def convolve(self, x: torch.Tensor, name: str, real: torch.Tensor) -> torch.Tensor:
        x = self.linear(x, f"{name}.pointwise_conv1")
        if self.squeeze:
            x = x * torch.sigmoid(x)
        else:
            value, gate = x.chunk(2, -1)
            x = value * torch.sigmoid(gate)
        x = (x * real[..., None]).transpose(1, 2)
        weight = self.get(f"{name}.depthwise_conv.weight")
        kernel = weight.shape[2]
        chunks = self.cfg.get("conv_context_size") == "causal"
        x = F.pad(x, (kernel - 1, 0) if chunks else (kernel // 2, kernel // 2))
        x = F.conv1d(x, weight, self.get(f"{name}.depthwise_conv.bias"), groups=x.shape[1]).transpose(1, 2)
        norm = f"{name}.batch_norm"
        if self.cfg["conv_norm_type"] == "layer_norm":
            x = self.norm(x, norm)
        else:
            x = (x - self.get(f"{norm}.running_mean")) / (self.get(f"{norm}.running_var") + 1e-5).sqrt()
            x = x * self.get(f"{norm}.weight") + self.get(f"{norm}.bias")
        return self.linear(x * torch.sigmoid(x), f"{name}.pointwise_conv2")

    def forward_ff(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self.linear(x, f"{name}.linear1")
        return self.linear(x * torch.sigmoid(x), f"{name}.linear2")

    def conformer(self, x: torch.Tensor, name: str, real: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.forward_ff(self.norm(x, f"{name}.norm_feed_forward1"), f"{name}.feed_forward1")
        x = x + self.attend(self.norm(x, f"{name}.norm_self_att"), f"{name}.self_attn", allowed)
        x = x + self.convolve(self.norm(x, f"{name}.norm_conv"), f"{name}.conv", real)
        x = x + 0.5 * self.forward_ff(self.norm(x, f"{name}.norm_feed_forward2"), f"{name}.feed_forward2")
        return self.norm(x, f"{name}.norm_out")

    def squeezeformer(self, x: torch.Tensor, name: str, real: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        def scaled(x: torch.Tensor, branch: str) -> torch.Tensor:
            return x * self.get(f"{name}.{branch}_scale.scale") + self.get(f"{name}.{branch}_scale.bias")

        y = self.attend(scaled(x, "self_attn"), f"{name}.self_attn", allowed)
        x = self.norm(x + y, f"{name}.norm_self_att")
        y = self.forward_ff(scaled(x, "feed_forward1"), f"{name}.feed_forward1")
        x = self.norm(x + y, f"{name}.norm_feed_forward1")
        y = self.convolve(scaled(x, "conv"), f"{name}.conv", real)
        x = self.norm(x + y, f"{name}.norm_conv")
        y = self.forward_ff(scaled(x, "feed_forward2"), f"{name}.feed_forward2")
        return self.norm(x + y, f"{name}.norm_feed_forward2")

    def allowed(self, time: int) -> torch.Tensor:
        places, size = torch.arange(time), self.cfg["att_context_size"]
        if self.cfg["self_attention_model"] == "rel_pos_local_attn":
            return (places[:, None] - places).abs() <= size[0]
        if self.cfg.get("att_context_style", "regular") == "regular" or size == [-1, -1]:
            return torch.ones(time, time, dtype=torch.bool)
        left, right = size[0] if isinstance(size[0], list) else size
        behind = places[:, None] // (right + 1) - places // (right + 1)
        return (behind >= 0) & (behind <= left // (right + 1))

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of features [B, T, mels], and their lengths."""
        self.dtype = features.dtype
        x, lengths = self.subsample(features, lengths)
        x = x * (math.sqrt(self.cfg["d_model"]) if self.cfg["xscaling"] else 1.0)
        real = torch.arange(x.shape[1]) < lengths[:, None]
        allowed = self.allowed(x.shape[1]) & real[:, None]
        reduced, saved = self.cfg.get("time_reduce_idx"), None
        if self.squeeze:
            x = self.norm(x, "encoder.pre_ln")
        for block in range(self.cfg["n_layers"]):
            if self.squeeze and block == reduced:
                saved = x, real, allowed
                name = "encoder.time_reduce_layer.dw_conv"
                x = (x * real[..., None]).transpose(1, 2)
                weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
                x = F.conv1d(x, weight, bias, stride=2, padding=3, groups=x.shape[1]).transpose(1, 2)
                x = self.linear(x, "encoder.time_reduce_layer.pw_conv")
                real, allowed = real[:, ::2], allowed[:, ::2, ::2]
                x = x[:, : real.shape[1]]
            if saved is not None and block == self.cfg["n_layers"] - 1:
                before, real, allowed = saved
                x = torch.stack([x, x], 2).flatten(1, 2)[:, : before.shape[1]]
                x = before + self.linear(x, "encoder.time_recovery_layer")
            step = self.squeezeformer if self.squeeze else self.conformer
            x = step(x, f"encoder.layers.{block}", real, allowed)
        return self.linear(x, "decoder.decoder_layers.0"), lengths

    def archive(self, path, mode: str = "w", start: str = "", **more):
        """A .nemo file; more are members by name, with a dot for "__"."""
        weights = io.BytesIO()
        torch.save(self.tensors, weights)
        members = {"model_config.yaml": yaml.safe_dump(self.config).encode(), "model_weights.ckpt": weights.getvalue()}
        return pack(path, members | {name.replace("__", "."): text for name, text in more.items()}, mode, start)


def pack(path, members: dict[str, bytes], mode: str = "w", start: str = ""):
    with tarfile.open(path, mode) as file:
        for name, text in members.items():
            entry = tarfile.TarInfo(start + name)
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    return path

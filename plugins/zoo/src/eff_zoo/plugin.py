"""Declares the model zoo to eff. Imports no torch; `build_model` imports the one model it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eff.method import Extension, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run
    from eff.schemas import ModelSpec


class Zoo(Extension):
    """Model sources `zoo:NAME`."""

    schemes = ("zoo",)
    models = {
        "zoo:digits_cnn": "3 convolutions and a linear layer for 8 x 8 grey images; 4.3 k parameters",
        "zoo:cifar_resnet20": "ResNet-20 for 32 x 32 images (He et al., CVPR 2016); 0.27 M parameters",
        "zoo:cifar_resnet32": "ResNet-32 for 32 x 32 images (He et al., CVPR 2016); 0.46 M parameters",
        "zoo:cifar_resnet44": "ResNet-44 for 32 x 32 images (He et al., CVPR 2016); 0.66 M parameters",
        "zoo:cifar_resnet56": "ResNet-56 for 32 x 32 images (He et al., CVPR 2016); 0.85 M parameters",
        "zoo:vit_micro": "ViT of width 64 and depth 4 for digits and CIFAR on a desk; 0.2 M parameters",
        "zoo:vit_tiny": "ViT with DeiT-tiny's width and depth (Touvron et al., ICML 2021); 5.7 M parameters at 224 px",
        "zoo:mobilenet_v2": "MobileNetV2, also with a stem for 32 x 32 (Sandler et al., CVPR 2018); 3.5 M parameters",
        "zoo:efficientnet_lite0": "EfficientNet-Lite0, ImageNet weights with pretrained=true; 4.7 M parameters",
        "zoo:minilm_classifier": "MiniLM-L6 sentence encoder with its weights, mean pooling, a linear head; 22.6 M parameters",
        "zoo:text_tiny": "BERT of width 32 and depth 2 on hashed words, for trying things out; 54 k parameters",
        "zoo:llama_tiny": "Llama of width 64 and depth 2 with grouped queries, a language model for a desk; 90 k parameters",
        "zoo:gpt2_tiny": "GPT-2 of width 64 and depth 2, a language model for a desk; 0.15 M parameters",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the model that `zoo:NAME` names; num_classes and in_channels default to the task's."""
        if spec.scheme != "zoo":
            return None
        from eff_zoo.building import build

        return build(spec, run)

"""Tiny vision towers by themselves, built offline from configurations."""

from __future__ import annotations

from pathlib import Path


def tower(directory: Path, kind: str) -> Path:
    """A vision tower with its image processor: clip, siglip or internvit."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**size, image_size=28, patch_size=14, attention_dropout=0.1)
        transformers.CLIPVisionModel(config).save_pretrained(directory)
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    elif kind == "siglip":
        config = transformers.SiglipVisionConfig(**size, image_size=28, patch_size=14, attention_dropout=0.1)
        transformers.SiglipVisionModel(config).save_pretrained(directory)
        images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    else:
        config = transformers.InternVLVisionConfig(**size, image_size=[28, 28], patch_size=[14, 14])
        transformers.InternVLVisionModel(config).save_pretrained(directory)
        images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    images.save_pretrained(directory)
    return directory

"""The original code of DETR (facebookresearch/detr) and of RT-DETRv2 (lyuwenyu/RT-DETR)."""

from zoo.convert.detr.original import from_detr

__all__ = ["from_detr"]

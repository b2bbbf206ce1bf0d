"""The original code of DETR (facebookresearch/detr), RT-DETRv2 (lyuwenyu/RT-DETR) and D-FINE (Peterande/D-FINE)."""

from zoo.convert.detr.original import from_detr

__all__ = ["from_detr"]

"""Trained models on their way to others: small enough to ship, with a card, and to the Hugging Face Hub."""

from .card import percent, render_card, render_table
from .folder import Prepared, prepared
from .half_precision import save_half_precision
from .upload import UploadError, claim, push, upload

__all__ = [
    "Prepared",
    "UploadError",
    "claim",
    "percent",
    "prepared",
    "push",
    "render_card",
    "render_table",
    "save_half_precision",
    "upload",
]

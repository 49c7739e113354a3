"""What a training run left behind, read back: its log, its findings, and a page about them."""

from .page import render, sure
from .read import Finding, Run, read_run

__all__ = ["Finding", "Run", "read_run", "render", "sure"]

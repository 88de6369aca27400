"""ONNX Runtime itself, imported here alone, so that its telemetry and its messages on stderr are off before anything runs.

Its official builds send events to Microsoft and keep a database and an identifier of the machine in the home folder. That
begins while it is imported: only the environment variable stops it then (onnxruntime/Privacy.md, "Disabling Telemetry").
Errors reach the user as exceptions; what it prints beside them is the same text.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

onnxruntime.disable_telemetry_events()  # where another package has imported it before

SILENT = 4
"""The severity that ONNX Runtime calls fatal: as ``log_severity_level`` of a session it leaves nothing to print."""
onnxruntime.set_default_logger_severity(SILENT)

__all__ = ["SILENT", "onnxruntime"]

"""The only import of ONNX Runtime, which turns off its telemetry and its messages on stderr.

Its official builds send events to Microsoft and keep a database and an identifier of the machine in the home folder. Telemetry
starts during the import, when only the environment variable stops it (onnxruntime/Privacy.md, "Disabling Telemetry"). Errors
reach the user as exceptions, with the same text as the messages.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

onnxruntime.disable_telemetry_events()  # in case another package imported it before

SILENT = 4
"""The severity "fatal": as ``log_severity_level`` of a session, nothing is printed."""
onnxruntime.set_default_logger_severity(SILENT)

__all__ = ["SILENT", "onnxruntime"]

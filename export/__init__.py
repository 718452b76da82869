"""SavedModels that a stock TensorFlow Serving loads and answers from."""

from export.runtime import Runtime, RuntimeCrashError
from export.saved_model import export_saved_model
from export.session import StatusError
from export.verify import Check, Report, verify

__all__ = [
    "Check",
    "Report",
    "Runtime",
    "RuntimeCrashError",
    "StatusError",
    "export_saved_model",
    "verify",
]

"""SavedModels that a stock TensorFlow Serving loads and answers from."""

from export.checks import Check
from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError
from export.verify import Report, verify

__all__ = [
    "Check",
    "Report",
    "Runtime",
    "RuntimeCrashError",
    "StatusError",
    "export_saved_model",
    "verify",
]


def __getattr__(name: str):
    """Import the exporter when it is asked for: it needs Keras, a server does not."""
    if name == "export_saved_model":
        from export.saved_model import export_saved_model

        return export_saved_model
    raise AttributeError(f"module 'export' has no attribute {name!r}")

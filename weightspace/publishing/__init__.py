"""Publishing encoders, zoos and plain models to the Hub."""

from __future__ import annotations

from weightspace.publishing.contents import PlannedFile, PushSettings
from weightspace.publishing.push import PushPlan, push_folder

__all__ = ["PlannedFile", "PushPlan", "PushSettings", "push_folder"]

"""Publishing encoders, zoos and plain models to the Hub."""

from __future__ import annotations

from weightspace.publishing.plan import PlannedFile, Published, PushPlan, PushSettings
from weightspace.publishing.push import push_folder

__all__ = ["PlannedFile", "Published", "PushPlan", "PushSettings", "push_folder"]

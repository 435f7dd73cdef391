"""Models of the Hub become a zoo: a plan that is made once, fetching that can be interrupted, and a run that writes."""

from __future__ import annotations

from weightspace.crawl.plan import CrawlSettings, Plan, make_plan, read_plan
from weightspace.crawl.run import CrawlSummary, crawl, prepare_crawl

__all__ = ["CrawlSettings", "CrawlSummary", "Plan", "crawl", "make_plan", "prepare_crawl", "read_plan"]

"""Crawls of the Hub: a plan made from one listing, checkpoints fetched concurrently, and a zoo that is written."""

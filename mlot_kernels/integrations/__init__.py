"""Adapters to other projects. The core imports none of them, and they patch nothing by themselves."""

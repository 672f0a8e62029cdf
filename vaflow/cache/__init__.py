"""The feature cache between the stages; `cache_schema.md` specifies it."""

from vaflow.cache.cache import Cache
from vaflow.cache.opening import address, create_cache, is_cache, open_cache
from vaflow.cache.schema import Item

__all__ = ["Cache", "Item", "address", "create_cache", "is_cache", "open_cache"]

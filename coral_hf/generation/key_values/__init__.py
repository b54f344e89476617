"""The target's keys and values during verification: the choice of cache, tree masks, compaction, recurrent states."""

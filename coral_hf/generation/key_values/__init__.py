"""Keys and values of the target: which cache contains them, what a draft tree does to it, and what a drafter has read of it."""

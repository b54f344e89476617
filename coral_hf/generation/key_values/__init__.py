"""Keys and values of the target: which cache holds them, what a draft tree does to it, and what a drafter has read of it."""

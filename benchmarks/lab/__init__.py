"""The method lab's parts: text, the small target's world, recipes, what is measured of a drafter, and the record."""

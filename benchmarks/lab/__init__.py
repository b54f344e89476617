"""The parts of the method lab: text, the small target's world, recipes, measurements of a drafter, and the record."""

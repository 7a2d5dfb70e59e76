"""What projects on top of kestra import to test their own code; nothing is imported before it is used."""

seed_of_the_test: int = 0
"""From what the values of the factories are drawn. The plugin sets it for each test, before anybody imports them."""

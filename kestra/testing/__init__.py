"""What projects on top of kestra import to test their own code; nothing is imported before it is used."""

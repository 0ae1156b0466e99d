Report = convert = revert = None

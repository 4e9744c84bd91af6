def register(op):
    return None

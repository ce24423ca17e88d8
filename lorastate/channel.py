import equinox as eqx
class Inputs(eqx.Module):
    pass
class Fresh(Inputs):
    pass

"""Fine-tuning by a rank-one LoRA update on the frozen map."""
from __future__ import annotations
from typing import Any, NamedTuple
import jax, jax.numpy as jnp
from .order import *
from .prox import VectorProblem, ldl_solve, minimise
from .pretraining import standard_fields
from .symmetric import complement

Q0_LORA = 1.0
class Frozen(NamedTuple):
    M: Any
    Q: Any
    size: Any   # Q0+delta'/2

def fresh(frozen, fine, nodes):
    one,two = standard_fields(nodes, fine.tokens, fine.activation.forgets_shift)
    zw = jnp.sqrt(frozen.Q)*one
    y0 = frozen.M/frozen.Q*zw + jnp.sqrt(frozen.size-frozen.M**2/frozen.Q)*two
    return y0, zw

def problem(fine, frozen, order, nodes):
    y0,zw = fresh(frozen, fine, nodes)
    T=fine.tokens
    chi=nodes[-2*T:-T]; om = order.overlap*chi+order.noise*nodes[-T:]
    return VectorProblem(fine.activation, zw, om, fine.activation(y0+chi[:,None]*chi[None]), order.response)

def inner(fine, frozen, order, nodes):
    p = problem(fine, frozen, order, nodes)
    om=p.omega
    # starts
    r = jnp.sqrt(jnp.sum(om*om,0))
    chi=nodes[-2*fine.tokens:-fine.tokens]
    starts = jnp.stack([om, -om, chi, -chi])
    u,f,ok = jax.lax.map(lambda s: minimise(p,s), starts)
    k=jnp.argmin(f,0)
    best=jnp.take_along_axis(u,k[None,None],0)[0]
    two=jnp.max(jnp.abs(u-best[None]),(0,1))>1e-4
    return best, two, ok.all(0), 0

def conj(fine, frozen, order, nodes, w):
    u=inner(fine,frozen,order,nodes)[0]
    pot=lambda o: jnp.sum(w*problem(fine,frozen,o,nodes).terms(u)[0])/jnp.sum(w)
    d=slopes(pot,order,Q0_LORA)
    return -2*fine.alpha*d.response,-fine.alpha*d.overlap,2*fine.alpha*d.norm

def step(x,args,nodes):
    fine,frozen=args
    q,m,l=conj(fine,frozen,decode(x),nodes.normal,nodes.weight)
    v=1/(l+2*fine.lam)
    return from_norm(v,m*v,(m**2+q)*v**2,Q0_LORA).encode()

def start():
    return from_norm(jnp.array(.3),jnp.array(.9),jnp.array(.9),1.).encode()

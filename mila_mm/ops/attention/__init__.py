"""MILA's attention: its specification, the closed form for any device, the registered op, and its Triton kernels.

Notation of the kernels, for one image and one head of d channels; f = elu + 1, R_n the rotation at token n::

    k^ = f(k), k~ = R k^, q^ = f(q), q~ = R q^        km = mean_n k^_n        S = mean_n k~_n v_n^T   (d x d, fp32)
    z_n = 1 / (q^_n . km + eps)    P_n = z_n q~_n     o_n = S^T P_n + lepe(v)_n      y_n = o_n * silu(u_n)

    do = dy silu(u)    du = dy o silu'(u)             r_n = S do_n            e_n = -z_n (P_n . r_n)
    dq_n = (R_n^T z_n r_n + e_n km) f'(q_n)           dS' = mean_n P_n do_n^T         dkm' = mean_n e_n q^_n
    dk_n = (R_n^T dS' v_n + dkm') f'(k_n)             dv_n = dS'^T k~_n + lepe^T(do)_n

So S, km, dS' and dkm' are all that tokens share, and there are two sweeps in each direction:

=====================  ======================  ===========================================
kernel                 reads                   writes
=====================  ======================  ===========================================
state                  k, v                    parts of S and km
output                 q, v (with halo), u     y
gate_backward          q, v (halo), u, dy      do, du                   (only with a gate)
query_backward         q, do                   dq, parts of dS' and dkm'
key_value_backward     k, v, do (halo)         dk, dv
lepe_backward          v (halo), do            parts of the weight and bias gradients
=====================  ======================  ===========================================

Sums over tokens are taken in two stages of fixed order, without atomics: results are bitwise the same in every run and
in every batch. Sizes of the image are run-time arguments that no binary depends on.
"""

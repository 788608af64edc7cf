"""Mixture of experts: router, dispatch, experts, combine. Empty until the first MoE architecture lands."""

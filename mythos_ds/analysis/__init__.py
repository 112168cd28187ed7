"""What can be seen of one trained model: its state, its routers, its loss by depth, who may leave early."""

"""What can be seen of one trained model: where its state goes, its routers, its loss by depth, who may leave early."""

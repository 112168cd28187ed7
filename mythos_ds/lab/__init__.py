"""Studies of what looping, experts in the loop, stability and halting do. Each is run by `mythos-ds lab`."""

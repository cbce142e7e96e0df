"""How well the drift gate is set: circumstances that must raise no alarm, and real changes that must raise one."""

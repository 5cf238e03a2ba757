"""How adapters and parameters of losses are trained beside the student: gradients, optimizer, clipping, learning rate."""

from __future__ import annotations

import torch
from transformers import Trainer

from .models.parts import milestone_scheduler, scale_learning_rates


class TrainerOptimization(Trainer):
    """A Trainer whose `objective` has parameters of its own, which the student's wrapper does not know."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            self._average_adapter_gradients()
        return loss

    def _average_adapter_gradients(self) -> None:
        """One reduction per optimizer step: adapters live outside the student's DDP wrapper."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        if parameters:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = self.accelerator.reduce(flat, "mean")
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(piece.view_as(p.grad))

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.learning_rate_scales:
            scale_learning_rates(optimizer, self.model, self.args.learning_rate_scales)
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.objective.parameters() if id(p) not in present]
        if missing and self.lr_scheduler is not None:
            optimizer.param_groups[0]["params"].extend(missing)  # the user's scheduler knows the user's groups only
        elif missing:
            # No decay: it would pull a projection to 0, where it hides a student that does not follow.
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.learning_rate_milestones and self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            own = (self.args.learning_rate_milestones, self.args.learning_rate_gamma, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = milestone_scheduler(optimizer, *own), True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model):
        adapters = list(self.objective.parameters())
        if not adapters:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *adapters], self.args.max_grad_norm)

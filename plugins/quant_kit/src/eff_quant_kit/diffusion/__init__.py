"""What quantization methods of diffusion models share. Nothing is imported here.

A denoiser is any module called as `model(x, t, class_labels=labels)` that returns the predicted noise, a tensor or an
object with `.sample` (diffusers' UNet2DModel and DiT models); t (N,) int64, labels (N,) int64, the last one being null.

    task.py        task `diffusion`: images in [0, 1] are fed as [-1, 1]; loss: mean squared error of the noise
    schedule.py    Schedule(steps, beta_start, beta_end): add_noise, DDIM step (eta=1: DDPM), respaced timesteps
    sampling.py    predict_noise, guided_noise, sample, trajectories (the float model's own path: data-free calibration)
    models.py      `diffusion:digits_dit`, `diffusion:digits_unet`; trained_model(kind, seed, updates) for claims
    source.py      data `diffusion_digits?train=..&test=..&seed=..`: the digits under the task `diffusion`
    frechet.py     frechet_distance, digit_features (a classifier's penultimate layer), pca_features
    time_aware.py  TimeAwareQuantizer, follow_timesteps(model): a set of scales per timestep, switched by the model's t
    lookup.py      blocks(model), time_layers(model, ...): transformer blocks; layers fed by the time alone

    schedule = run.task.schedule
    path = trajectories(model, schedule, schedule.respaced(20), labels, run.task.shape, run.generator("calibration"))
    path.x[i], path.t[i], path.labels, path.noise[i]     # what the model saw and said at sampler step i
"""

"""Descriptions of GPUs for XLA, which compiles for one that is not there if it is told what it would ask of it."""

# Read off a device by XLA (JAX 0.11.2 with --xla_dump_to, driver 580.159), but for what names that one machine.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  kernel_mode_driver_version: "580.159.4"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.19.0"
  cub_version: "3.2.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  mem_clock_ghz: 2.619
  memory_bandwidth: 3352320000000
  device_memory_size: 85017493504
  l2_cache_size: 52428800
  pcie_bandwidth: 68719476736
  device_address_bits: 64
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  max_blocks_per_multiprocessor: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  reserved_shared_memory_per_block: 1024
  collective_memory_granularity: 2097152
}
"""

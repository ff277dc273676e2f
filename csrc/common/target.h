// SPDX-License-Identifier: Apache-2.0
// Marks what host and device share.
#pragma once

#ifdef __CUDACC__
#define STAMINA_HOST_DEVICE __host__ __device__
#else
#define STAMINA_HOST_DEVICE
#endif

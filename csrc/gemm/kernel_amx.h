#pragma once
#include "gemm/kernel_vec.h"

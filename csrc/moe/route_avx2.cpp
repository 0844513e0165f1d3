#include "moe/route_kernel.h"

namespace fastgpt::moe {

const RouteLoops kRouteLoopsAvx2 = kLoops;

}  // namespace fastgpt::moe
